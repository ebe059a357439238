"""Other people's software, by its official doors. Nothing is imported here: `autoload` must stay light."""
