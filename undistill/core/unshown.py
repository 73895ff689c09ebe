"""Finite numbers that stand for what an answer does not show, so that no loss becomes infinite."""

LOG_ZERO = -1e4  # for log 0
UNSHOWN = -(2.0**40)  # where an interface showed nothing; no log-probability and no sane logit is this number
