"""Concepts that a person can read and correct, between what comes in and what goes out.

A concept model is called as `model(x, truth=None, mask=None) -> Prediction`: where the
mask is 1 the concept is the truth, whatever the model thinks (`contract.py`). What is
not labelled is masked: a label that is missing changes nothing.

Models: `cbm` (independent, sequential, joint), `embedding`, `probabilistic`, `post_hoc`
(on a bank of `activation` vectors, or of `label_free` ones), `energy`. Questions to any
of them: `intervention` (who asks for which concept next, and what it gains), `audit`
and `leakage` (is it a bottleneck?). `fit` trains, `table` names them, `waist` puts
concepts inside another network.
"""
