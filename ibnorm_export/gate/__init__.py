"""`ibnorm-export check`: exports, verifies and times what check.toml names."""
