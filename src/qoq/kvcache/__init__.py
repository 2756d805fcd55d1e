"""Where past tokens live: which pages are free (allocator) and the pages themselves (pool)."""
