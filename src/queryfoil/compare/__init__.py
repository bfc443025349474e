"""Two runs side by side: `runs` reads them, `measures` has the paired intervals, `comparison` matches their cells."""
