"""A server: keys with budgets, batches, limits, and answers that are those of the audit."""
