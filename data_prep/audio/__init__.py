"""From audio files to encoder windows: `decode` reads files, `resample` changes the rate, `windows` cuts clips."""
