"""The prototype library: support sets, masks and prototypes that are kept between runs."""
