"""`mnist-dist doctor`: whether a machine or a launch is fit for a study."""
