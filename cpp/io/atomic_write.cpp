// Files and folders that are either wholly the old or wholly the new ones, whatever fails in between: written under a temporary
// name beside the target, synced, then renamed (a file) or exchanged (a folder) in one step. What failed is removed again. Declared
// in io/safetensors.h.
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "io/safetensors.h"

namespace loquetier {

namespace {

namespace fs = std::filesystem;

[[noreturn]] void fail(const fs::path& path, const char* what, int code) {
  throw Error(concat("[io] ", path.string(), ": cannot ", what, ": ", std::strerror(code)));
}

// An open descriptor; close() reports, the destructor does not.
class File {
 public:
  File(fs::path path, int flags, mode_t mode = 0) : path_(std::move(path)), file_(::open(path_.c_str(), flags | O_CLOEXEC, mode)) {}
  ~File() {
    if (file_ >= 0) ::close(file_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  bool opened() const { return file_ >= 0; }
  void write(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t n = ::write(file_, bytes.data(), std::min<size_t>(bytes.size(), 1u << 30));
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) fail(path_, "write", errno);
      bytes.remove_prefix(static_cast<size_t>(n));
    }
  }
  void sync() {
    // Some file systems cannot sync a folder; they order its entries by themselves.
    if (::fsync(file_) != 0 && errno != EINVAL && errno != EROFS) fail(path_, "sync", errno);
  }
  void close() {
    const int file = std::exchange(file_, -1);
    if (::close(file) != 0 && errno != EINTR) fail(path_, "close", errno);
  }

 private:
  fs::path path_;
  int file_;
};

void sync_folder(const fs::path& folder) {
  File file(folder, O_RDONLY | O_DIRECTORY);
  if (!file.opened()) fail(folder, "open", errno);
  file.sync();
}

// Removes a temporary file or folder unless told that it is gone; never throws.
class Temporary {
 public:
  explicit Temporary(fs::path path) : path_(std::move(path)) {}
  ~Temporary() {
    std::error_code ignored;
    if (!path_.empty()) fs::remove_all(path_, ignored);
  }
  Temporary(const Temporary&) = delete;
  Temporary& operator=(const Temporary&) = delete;
  const fs::path& path() const { return path_; }
  void release() { path_.clear(); }

 private:
  fs::path path_;
};

// The target with symbolic links followed and without a trailing slash: the link stays, what it points to is replaced.
fs::path resolve(const fs::path& path) {
  fs::path full = fs::absolute(path).lexically_normal();
  if (!full.has_filename()) full = full.parent_path();
  require(full.has_filename(), "[io] path: expected the name of a file or folder to write, got '", path.string(), "'");
  std::error_code missing;
  const fs::path real = fs::canonical(full, missing);
  return missing ? full : real;
}

// Calls create(path) with new names beside the target until it does not fail with EEXIST. Returns the path it made.
template <class Create>
fs::path make_temporary(const fs::path& target, Create create) {
  for (int attempt = 0;; ++attempt) {
    const fs::path path =
        target.parent_path() / concat(".", target.filename().string().substr(0, 128), ".tmp-", ::getpid(), "-", attempt);
    if (create(path)) return path;
    if (errno != EEXIST || attempt == 10000) {
      if (errno == ENOENT || errno == ENOTDIR) throw NotFound(concat("[io] ", target.parent_path().string(), ": no such folder"));
      fail(path, "be created", errno);
    }
  }
}

void write_new_file(const fs::path& path, std::string_view bytes) {
  File file(path, O_WRONLY | O_CREAT | O_EXCL, 0666);
  if (!file.opened()) fail(path, "be created", errno);
  file.write(bytes);
  file.sync();
  file.close();
}

// Exchanges temporary and folder in one step where the file system can; else the old folder is first renamed aside, and back if
// that fails.
void exchange_folders(const fs::path& temporary, const fs::path& folder) {
  if (::renameat2(AT_FDCWD, temporary.c_str(), AT_FDCWD, folder.c_str(), RENAME_EXCHANGE) == 0) return;
  if (errno != EINVAL && errno != ENOSYS) fail(folder, "be replaced", errno);
  const fs::path aside = make_temporary(folder, [&](const fs::path& path) {
    if (::access(path.c_str(), F_OK) == 0) {
      errno = EEXIST;
      return false;
    }
    return ::rename(folder.c_str(), path.c_str()) == 0;
  });
  if (::rename(temporary.c_str(), folder.c_str()) != 0) {
    const int code = errno;
    if (::rename(aside.c_str(), folder.c_str()) != 0) {
      throw Error(concat("[io] ", folder.string(), ": cannot be replaced: ", std::strerror(code), "; the old folder is now ",
                         aside.string()));
    }
    fail(folder, "be replaced", code);
  }
  ::rename(aside.c_str(),
           temporary.c_str());  // where the caller removes it; when that fails the old folder stays under its other name
}

// Refuses a folder whose replacement would lose somebody's files; links what has to be kept into the new one.
void treat_other_files(const fs::path& old, const fs::path& fresh, const std::map<std::string, std::string>& files,
                       OtherFiles rule) {
  bool empty = true, known = false;
  for (const fs::directory_entry& entry : fs::directory_iterator(old)) {
    const std::string name = entry.path().filename().string();
    empty = false;
    if (files.count(name)) {
      known = true;
    } else if (rule == OtherFiles::keep) {
      require(!entry.is_directory() || entry.is_symlink(), "[io] ", old.string(),
              ": expected a folder of files to write into, got the subfolder '", name, "' in it; choose another folder");
      std::error_code failed;
      fs::create_hard_link(entry.path(), fresh / name, failed);
      if (failed) fs::copy(entry.path(), fresh / name, fs::copy_options::copy_symlinks);
    }
  }
  require(rule == OtherFiles::keep || empty || known, "[io] ", old.string(), ": expected a new or empty folder, or one that holds ",
          files.begin()->first, " (written before), got a folder of other files; choose another folder");
}

}  // namespace

void write_file_atomically(const fs::path& path, std::string_view bytes) {
  const fs::path target = resolve(path);
  std::error_code ignored;
  require(!fs::is_directory(target, ignored), "[io] ", path.string(), ": expected a file to write, got a folder");
  Temporary temporary(make_temporary(target, [](const fs::path& name) {
    const int file = ::open(name.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (file >= 0) ::close(file);
    return file >= 0;
  }));
  File file(temporary.path(), O_WRONLY);
  if (!file.opened()) fail(temporary.path(), "be opened", errno);
  file.write(bytes);
  file.sync();
  file.close();
  if (::rename(temporary.path().c_str(), target.c_str()) != 0) fail(target, "be replaced", errno);
  temporary.release();
  sync_folder(target.parent_path());
}

void write_folder_atomically(const fs::path& folder, const std::map<std::string, std::string>& files, OtherFiles other_files) {
  require(!files.empty(), "[io] ", folder.string(), ": expected files to write, got none");
  for (const auto& [name, bytes] : files) {
    require(!name.empty() && name != "." && name != ".." && name.size() <= 255 && name.find('/') == std::string::npos &&
                name.find('\0') == std::string::npos,
            "[io] ", folder.string(), ": expected plain file names, got '", name, "'");
  }
  const fs::path target = resolve(folder);
  try {
    const bool exists = fs::exists(target);
    require(!exists || fs::is_directory(target), "[io] ", folder.string(), ": expected a folder, got a file");
    fs::create_directories(target.parent_path());
    Temporary temporary(make_temporary(target, [](const fs::path& name) { return ::mkdir(name.c_str(), 0777) == 0; }));
    if (exists) treat_other_files(target, temporary.path(), files, other_files);
    for (const auto& [name, bytes] : files) write_new_file(temporary.path() / name, bytes);
    sync_folder(temporary.path());
    if (exists) {
      exchange_folders(temporary.path(), target);  // the temporary name now holds the old folder, which goes with it
    } else {
      if (::rename(temporary.path().c_str(), target.c_str()) != 0) fail(target, "be created", errno);
      temporary.release();
    }
    sync_folder(target.parent_path());
  } catch (const fs::filesystem_error& error) {
    throw Error(concat("[io] ", folder.string(), ": cannot be written: ", error.code().message()));
  }
}

}  // namespace loquetier
