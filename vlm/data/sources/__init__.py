"""Where pairs come from before they are shards."""
