"""The service's log beside the lake: whether it is whole, whether all of it arrived, and what of it may go."""
