"""Tables: measured beside published, and the paper's claims."""
