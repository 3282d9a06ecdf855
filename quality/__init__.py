"""How good the networks become, measured: `python -m quality.run`. The page is docs/quality.md."""
