"""Data sets: layouts, class names, metrics."""
