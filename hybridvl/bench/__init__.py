"""Side-by-side measurements: our operators and models against named peers, compared before they are timed."""
