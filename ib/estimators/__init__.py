"""Information between two samples: one file an estimator, `table.py` lists them."""
