"""Files of weights and snapshots: reading, checking, recognizing, loading and exporting them."""
