"""Evaluation (Sec. 4): data sets, the mIoU and the protocol that joins them to a segmenter."""
