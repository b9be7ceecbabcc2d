"""One file a suite: what is timed, beside which peer."""
