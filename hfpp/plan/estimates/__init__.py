"""What layers, stages and ranks cost in operations, seconds and bytes, by formula."""
