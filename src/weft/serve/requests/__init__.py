"""What goes into the engine and what comes out: requests, their forms, and one completion on its way."""
