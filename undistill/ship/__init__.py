"""What leaves the house: exported folders."""
