"""What several processes do together: sums over them, weights in shards."""
