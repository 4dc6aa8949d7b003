"""Structure of networks: units that are scored, removed, grown and reset while a run goes on."""
