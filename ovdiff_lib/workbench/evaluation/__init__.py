"""Evaluation (Sec. 4): one loop over a data set, one store of counts, the bench of the tables."""
