"""`vit doctor`: what a long run needs, looked at and measured before it starts: machine, config, data, speed, disk."""
