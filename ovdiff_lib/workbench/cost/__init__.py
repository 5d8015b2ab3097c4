"""What OVDiff costs: operations counted (flops), steps timed (steps), and ratios against named alternatives
(benchmark)."""
