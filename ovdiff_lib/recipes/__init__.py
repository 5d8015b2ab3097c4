"""How the mini world and its models were made. Only ``make mini-world`` and the tests run this code."""
