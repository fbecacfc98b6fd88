"""How far may the weights move: anchor weights, projections of the change, and the statistics behind them."""
