"""What a run takes: operations, bytes, time and money, counted without starting it."""
