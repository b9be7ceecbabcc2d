"""Information-bottleneck objectives for any encoder; `table.py` lists them."""
