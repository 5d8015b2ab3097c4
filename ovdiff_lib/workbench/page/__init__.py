"""Tables, figures and captions: what the notebooks save."""
