"""What is called what, both ways: tables of tensor names, arrangements of weights, keys of config.json."""
