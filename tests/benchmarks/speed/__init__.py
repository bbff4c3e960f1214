"""What flows cost beside other packages, and beside the conditioner networks alone."""
