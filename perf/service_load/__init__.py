"""A service under load or in trouble -> what its clients saw, beside plain loops and promises."""
