"""The networks of the zoo, and the policies that gate them."""
