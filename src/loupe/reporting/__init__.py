"""Pages for people: templates, and what fills them. It knows neither data nor models, only values."""
