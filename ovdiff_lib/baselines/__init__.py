"""Methods that the paper's tables compare OVDiff with, run under the same protocol."""
