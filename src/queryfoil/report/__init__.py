"""From stored results to what people read: terminal, Markdown, one self-contained HTML page."""
