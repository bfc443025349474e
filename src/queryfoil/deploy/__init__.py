"""From a protected model to a service: the file, the server, and what watches over it."""
