"""Steps that several merge functions are made of; nothing here is registered."""
