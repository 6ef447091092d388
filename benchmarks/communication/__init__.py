"""What compressed communication sends, costs and reaches, measured."""
