"""What answers an attacker."""
