"""Controllers inside training frameworks; each module imports its framework when it is first used."""
