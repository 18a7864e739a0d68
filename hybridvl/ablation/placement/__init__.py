"""Which layers of a teacher should keep attention: layers ranked, placements built under a budget and validated."""
