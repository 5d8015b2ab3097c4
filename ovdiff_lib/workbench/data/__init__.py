"""Data sets: readers, class names, metrics."""
