"""Lightning modules and the trainer that both kinds of model share."""
