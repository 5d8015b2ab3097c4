"""What OVDiff costs: steps timed (steps), ratios against alternatives (benchmark)."""
