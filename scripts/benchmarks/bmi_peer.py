"""bmi's KSG over samples named on standard input, under an interpreter that has it.

Each line is the path of a .npz with x and y; the answer is [nats, processor seconds].
Started by `information.py`; it imports nothing of narrows.
"""

import json
import sys
import time

import bmi
import numpy as np

if __name__ == "__main__":
    estimator = bmi.estimators.KSGEnsembleFirstEstimator(
        neighborhoods=(int(sys.argv[1]),)
    )
    for line in sys.stdin:
        with np.load(line.strip()) as sample:
            x, y = sample["x"], sample["y"]
        start = time.process_time()
        value = float(estimator.estimate(x, y))
        print(json.dumps([value, time.process_time() - start]), flush=True)
