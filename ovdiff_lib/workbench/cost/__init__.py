"""What OVDiff costs: operations counted (flops), steps timed (steps), ratios against alternatives (benchmark)."""
