"""What a run costs, counted without starting it: operations, bytes, time and money."""
