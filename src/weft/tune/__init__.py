"""What no datasheet says: this machine measured, and a plan's best layouts tried."""
