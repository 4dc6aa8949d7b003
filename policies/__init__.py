"""What decides: rules, learned policies, bundles and the controller of a live training loop."""
